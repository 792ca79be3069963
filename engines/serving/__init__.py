"""What runs inside tritonserver: requests in, streamed answers out, over the scheduler."""
