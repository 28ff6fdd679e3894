"""Python tasks on workers: sending them, their results, and their inputs."""
