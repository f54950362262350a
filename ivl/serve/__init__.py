"""The server: an engine behind the interface that clients already speak."""
