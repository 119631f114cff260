"""Level 2: what each op computes, held against float64."""
