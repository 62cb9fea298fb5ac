"""Entmax attention over a plan: kernels, and the function that launches them.

    o_i = sum_j p_ij v_j,   p_ij = max(0, z_ij - tau_i)^P,   z = (alpha - 1) scale q k,   P = 1 / (alpha - 1),
    tau_i such that sum_j p_ij = 1

(arXiv 1905.05702). tau of some keys is a lower bound of tau of all, and the P-norm of max(0, z - t) is convex in t, so
that a step of Newton's method from a lower bound gives a better one. Three passes follow from that:

1. `threshold.bracket` forms every score once and keeps of each row, in registers, the largest few of every residue
   class of columns. Their tau is a lower bound, and mostly within rounding of the row's own. On the way a bound of what
   was seen so far marks which tiles hold a score above it; the others are never looked at again.
2. `forward.values` sums over the marked tiles at t. Beside sum p v it forms sum u v, u = p^(2 - alpha) =
   max(0, z - t)^(P - 1): by it o is corrected to first order for what t still lacks. Rows whose slots may have
   overflowed first improve t by passes without values; rows that prove too far off after all are done again. Tiles with
   a p > 0 are marked anew.
3. `backward.queries` and `backward.columns` go over these: ds_ij = u_ij (dp_ij - delta_i), dp = do v,
   delta_i = do_i . (sum u v / sum u).

No program adds to what another one writes: equal inputs give equal bits. Cost: 2 D operations a pair of a listed tile,
2 (D + 2 Dv) of a marked one, backward 2 (4 D + 3 Dv) of one in use; memory of ten bytes a tile and head, and o twice.
"""

from saccade.softmax.kernels.entmax.attend import attend_entmax, reasons
from saccade.softmax.kernels.entmax.launch import Launch

__all__ = ["Launch", "attend_entmax", "reasons"]
