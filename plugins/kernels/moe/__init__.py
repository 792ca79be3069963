"""MoeLayer: the whole second half of a layer of experts, from hidden states to their output, in few launches."""
