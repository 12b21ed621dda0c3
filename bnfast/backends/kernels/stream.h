/* Results past the cache: an ordinary store reads a cache line from memory before it writes it.

   Only whole lines can go that way, and runs begin and end within lines. So a line that a run leaves
   unfinished waits for the next one, which begins where it ended: 7x7 planes are sent as whole lines
   too. Each line is made and sent at once; making many first was slower than ordinary stores, since
   then nothing is read while lines are on their way out.  Needs STORE, FN, vectors.h. */

/* A line of which the results [from, fill) are there, with room for a line before and behind it.
   Nothing is there if fill is 0. */
typedef struct {
    _Alignas(64) STORE room[3 * FN(LINE)];
    bn_index from, fill;
} FN(pending);

static inline void FN(begin)(FN(pending) *pending) { pending->from = pending->fill = 0; }

/* Store what is there; `y` is where the result behind the last of them goes. */
static inline void FN(end)(FN(pending) *pending, STORE *y)
{
    const STORE *line = pending->room + FN(LINE);
    const bn_index from = pending->from, n = pending->fill - from;
    if (n == FN(LINE))
        for (int k = 0; k < FN(LINE); k += FN(SIZE))
            FN(send)(y - n + k, FN(peek)(line + k));
    else if (n)
        memcpy(y - n, line + from, n * sizeof(STORE));
    FN(begin)(pending);
}

/* Send n adjacent results, a line or more, to y; make(i) is a vector of them from the i-th on, and
   ask(i) is done once a line. */
#define BN_SEND(pending, y, n, make, ask)                                                          \
    do {                                                                                           \
        STORE *const line_ = (pending)->room + FN(LINE);                                            \
        const bn_index begun_ = (bn_index)((uintptr_t)(y) % 64 / sizeof(STORE));                    \
        bn_index i_ = 0;                                                                           \
        if (begun_) {                                                                              \
            if ((pending)->fill == 0)                                                              \
                (pending)->from = begun_;                                                          \
            for (; i_ < FN(LINE); i_ += FN(SIZE))                                                  \
                FN(put)(line_ + begun_ + i_, make(i_));                                            \
            i_ = FN(LINE) - begun_;                                                                \
            (pending)->fill = FN(LINE);                                                            \
            FN(end)(pending, (y) + i_);                                                            \
        }                                                                                          \
        for (; i_ + FN(LINE) <= (n); i_ += FN(LINE)) {                                             \
            ask(i_);                                                                               \
            for (int k_ = 0; k_ < FN(LINE); k_ += FN(SIZE))                                        \
                FN(send)((y) + i_ + k_, make(i_ + k_));                                            \
        }                                                                                          \
        (pending)->fill = (n) - i_;                                                                \
        for (int k_ = 0; (pending)->fill && k_ < FN(LINE); k_ += FN(SIZE))                         \
            FN(put)(line_ + (pending)->fill - FN(LINE) + k_, make((n) - FN(LINE) + k_));           \
    } while (0)
