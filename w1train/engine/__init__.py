"""The part of w1train that uses megatron-core's builders, optimizers, pipeline schedules and gradient hooks."""
