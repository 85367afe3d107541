"""What a run writes down and shows: metrics, goodput, progress and tables."""
