"""What works on this machine, and how fast: the parts of w1train.doctor."""
