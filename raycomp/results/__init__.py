"""What a run has to say, as frozen values: progress while it trains, figures when it is done."""
