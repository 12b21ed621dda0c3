/* Results past the cache: an ordinary store reads a cache line from memory before it writes it.

   Only whole lines can go that way, and runs begin and end within lines. So a line that a run leaves
   unfinished waits for the next one, which begins where it ended: 7x7 planes are sent as whole lines
   too. Each line is made and sent at once; making many first was slower than ordinary stores, since
   then nothing is read while lines are on their way out.  Needs REAL, FN. */

enum { FN(LINE) = 64 / sizeof(REAL) };

/* A line of which the results [from, fill) are there, with room for a vector around each of them.
   Nothing is there if fill is 0. */
typedef struct {
    _Alignas(64) REAL room[3 * FN(LINE)];
    bn_index from, fill;
} FN(pending);

/* Send what is there; `y` is where the result after the last of them goes. */
static inline void FN(end)(FN(pending) *pending, REAL *y)
{
    const bn_index from = pending->from, n = pending->fill - from;
    if (pending->fill == 0)
        return;
    if (n == FN(LINE))
        BN_JOIN(stream, line, BN_TARGET)(y - n, pending->room + FN(LINE));
    else
        memcpy(y - n, pending->room + FN(LINE) + from, n * sizeof(REAL));
    pending->from = pending->fill = 0;
}

/* Send n adjacent results, a line or more, to y. make(i, to) makes a line of them, the i-th and
   those after it. */
#define BN_SEND(pending, y, n, make)                                                               \
    do {                                                                                           \
        REAL *const line_ = (pending)->room + FN(LINE);                                            \
        const bn_index begun_ = (bn_index)((uintptr_t)(y) % 64 / sizeof(REAL));                    \
        bn_index i_ = 0;                                                                           \
        if (begun_) {                                                                              \
            if ((pending)->fill == 0)                                                              \
                (pending)->from = begun_;                                                          \
            make(0, line_ + begun_);                                                               \
            i_ = FN(LINE) - begun_;                                                                \
            (pending)->fill = FN(LINE);                                                            \
            FN(end)(pending, (y) + i_);                                                            \
        }                                                                                          \
        for (; i_ + FN(LINE) <= (n); i_ += FN(LINE)) {                                             \
            _Alignas(64) REAL made_[FN(LINE)];                                                     \
            make(i_, made_);                                                                       \
            BN_JOIN(stream, line, BN_TARGET)((y) + i_, made_);                                     \
        }                                                                                          \
        (pending)->fill = (n) - i_;                                                                \
        if ((pending)->fill)                                                                       \
            make((n) - FN(LINE), line_ + (pending)->fill - FN(LINE));                              \
    } while (0)
