"""Names of a request's inputs: the own ones, those of other servers, and what is made of them."""
