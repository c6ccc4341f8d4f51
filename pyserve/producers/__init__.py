"""Where generations come from: an upstream server, a local model, the demo."""
