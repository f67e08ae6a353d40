"""What benchmark programs share: others' algorithms written out plainly, clocks and floors.

Training never imports it.
"""
