"""What a traced program holds and costs."""
