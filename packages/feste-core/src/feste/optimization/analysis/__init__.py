"""What passes and explanations find out about a graph, without changing it."""
