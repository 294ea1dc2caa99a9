"""Pure functions of tensors: recall, CSLS, similarity of feature spaces, intervals."""
