"""Requests that go out from workers: a pump in each, and the client's end of it."""
