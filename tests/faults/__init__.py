"""The faults that a user meets, F01 to F40: each is refused, or handled, in a way that says what, where and how to mend it."""
