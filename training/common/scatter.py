"""When a difference is more than scatter."""

# Of 1, 2 and 3 degrees of freedom, where the expansion below is a hundredth or more off.
FEW = (12.706, 4.303, 3.182)


def student(freedom: int) -> float:
    """Return the 97.5 percent quantile of Student's t, to a hundredth.

    The expansion of Cornish and Fisher about the normal quantile (Abramowitz and Stegun, 26.7.5).

    Args:
        freedom: degrees of freedom, at least 1.
    """
    if freedom <= len(FEW):
        return FEW[freedom - 1]
    z, f = 1.959963985, freedom
    return (
        z
        + (z**3 + z) / (4 * f)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * f**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * f**3)
    )
