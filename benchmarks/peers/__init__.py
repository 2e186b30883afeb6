"""The same work on the same data, by this package, by hand, and by other frameworks."""
