"""How fast offers are: what one call of each op has to do, and the clock."""
