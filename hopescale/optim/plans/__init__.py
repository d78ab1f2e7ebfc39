"""How one bucket of matrices is orthogonalised across ranks, a file a kind of plan.

A plan is a generator: it begins an exchange, yields, and goes on when it is asked for more, so that buckets can take
turns. Given the flat fp32 local tensors of a bucket's parameters, it leaves the orthogonalised pieces in them.
"""
