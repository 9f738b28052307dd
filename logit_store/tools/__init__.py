"""What people do with a store from the command line: look at it, prove it, compare, cut, join and export it."""
