"""What every family builds on: routing, routers, expert banks, the MoE layer, models, tasks, training."""
