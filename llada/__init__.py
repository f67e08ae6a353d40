"""The small common module of the suite: everything that two or more stage scripts share."""
