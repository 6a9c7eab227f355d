"""Graph passes: recognise building blocks, combine them into fused ops where that is measured to be faster, report."""
