"""What is assumed of other libraries, one file an upstream: names, signatures, protocols."""
