"""Training with a cache: joining it to a data set, losses, criteria. torch starts here."""
