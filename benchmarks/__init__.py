"""Speed of natten2 against other ways to compute the same attention: `python -m benchmarks NAME`."""
