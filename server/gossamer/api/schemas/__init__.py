"""The JSON objects of requests and replies. Unknown fields of a request are refused by name."""
