"""Small-scale checks on CIFAR-10 of what the publications claim; see docs/claims.md."""
