"""Pure arithmetic from numbers to advice: no I/O, no clock."""
