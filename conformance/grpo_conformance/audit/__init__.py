"""Level of proof 1: a plugin's calls into a vendor's package, held against that package's own signatures.

Nothing of the vendor is installed, imported or run. What is checked: that an op exists in every version that
the offer admits, its keywords and positional arguments, values and arguments that the vendor's documentation
wants together, that an offer with a backward pass calls nothing without a gradient, and that what an offer
declares as its `symbols` is what it calls. What is not: shapes, dtypes and numbers.
"""
