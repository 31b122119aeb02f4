"""Attribution graphs of one prompt: a linear replacement model, its edges, their influence, and
interventions that test them.
"""
