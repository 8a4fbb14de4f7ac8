"""What a refusal at the start says."""


def line_of(error: BaseException) -> str:
    """The line of a message that says what is wrong; pydantic wraps two others around it."""
    (line,) = [line for line in str(error).splitlines() if "Value error" in line]
    return line.split(" [type=")[0]
