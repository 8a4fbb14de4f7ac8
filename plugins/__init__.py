"""The methods, one file each: decoding/, reuse/ and selection/."""
