"""Training of the tokenizer and the prior: data, state and one step of each."""
