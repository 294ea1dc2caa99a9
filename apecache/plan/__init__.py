"""The planner: what a recipe trains, where the cache cuts, and what it costs."""
