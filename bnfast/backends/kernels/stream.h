/* Results past the cache: an ordinary store reads a cache line from memory before it writes it.

   Only whole lines can go that way, and runs begin and end within lines. So the results are walked
   line by line, whatever they belong to, and a line in which one run of a channel ends and the next
   begins is made from the numbers of both. (Putting such a line together from two halves, in
   memory, means to wait until all stores before it are done: up to 1.7 times slower.) What lies before
   the first whole line and behind the last is stored as usual. Each line is made and sent at once;
   making many first was slower than ordinary stores, since then nothing is read while lines are on
   their way out.  Needs REAL, STORE, FN, vectors.h. */

/* Elements before the first line that begins at y or later; `elements` if there are fewer. */
static inline bn_index FN(to_line)(const STORE *y, bn_index elements)
{
    return bn_min(elements, (bn_index)(-(uintptr_t)y % 64 / sizeof(STORE)));
}

/* The elements of a vector that come after the first `left` ones, for any `left`. */
static inline FN(mask) FN(after)(bn_index left)
{
    FN(mask) number;
    for (int k = 0; k < FN(SIZE); k++)
        number[k] = k;
    return number >= (__typeof__(number[0]))left;
}

/* One vector before the elements of a mask, the other there. */
static inline FN(vector) FN(either)(FN(mask) after, FN(vector) one, FN(vector) other)
{
    return (FN(vector))(((FN(mask))one & ~after) | ((FN(mask))other & after));
}
