"""What may be sent, and when: gates, waits for a cached prefix, and further attempts."""
