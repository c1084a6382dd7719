"""Small networks of many seeds at once: every parameter and activation is a stack [R, ...], one entry a seed."""
