"""The few models that carry any attention: a host knows the contract and no mechanism."""
