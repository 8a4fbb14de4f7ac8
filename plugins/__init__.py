"""Methods, one file each: decoding/, reuse/, selection/ and extent/."""
