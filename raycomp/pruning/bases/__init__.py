"""What pruners of one kind share."""
