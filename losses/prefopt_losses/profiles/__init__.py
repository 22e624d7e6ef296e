"""The microscope: what a function does as a preference loss, and the beta that matches another's.

curve        float64 values and slopes of f        convexity    certified, refuted at x, or not refuted
shape        stationary points, kinks, tails       matching     win probability, population class, optimum
matched_beta one loss's beta for another's         profile      all of it, of a function, a term or a loss
verdicts     a profile in words
"""
