// The largest logits of a row, without sorting it.
#pragma once

#include "sampling_vec.h"

namespace ISA {
namespace {

// The rooms that one thread works in.
struct Room {
    std::vector<float> logits, values, maxima;
    std::vector<int32_t> keys, ids;
    int64_t found;  // how many of the ids count
    std::vector<uint32_t> weights;
    std::vector<uint64_t> sums;
};

// The largest key that at least `count` of keys[n] reach, or any that at most `enough` reach beside. n is a multiple of
// LANES. Halving an interval costs no wrong guess of a branch, which ordering the keys does at every other one.
int32_t edge_of(const std::vector<int32_t>& keys, int64_t count, int64_t enough) {
    const auto at = [&](size_t i) INLINE_BODY { return load(&keys[i]); };
    i16 least = at(0), most = least;
    for (size_t i = LANES; i < keys.size(); i += LANES) {
        least = __builtin_elementwise_min(least, at(i));
        most = __builtin_elementwise_max(most, at(i));
    }
    int64_t low = __builtin_reduce_min(least), high = __builtin_reduce_max(most);
    while (low < high) {  // low is reached by count of them, what is above high is not
        const int64_t middle = low + (high - low + 1) / 2;
        int64_t reached = 0;
        for (size_t i = 0; i < keys.size(); i += LANES) {
            reached += __builtin_popcount(bits_of(at(i) >= static_cast<int32_t>(middle)));
        }
        if (reached >= count) {
            low = middle;
            if (reached <= enough) break;
        } else {
            high = middle - 1;
        }
    }
    return static_cast<int32_t>(low);
}

// A value that at least `count` of x[n] reach, and not many more: the count-th largest maximum of groups is not above
// the count-th largest of all.
float lower_bound_of(int64_t count, Room& room) {
    const int64_t vectors = room.maxima.size() / LANES;
    if (vectors * LANES < count) return -INFINITY;
    const int64_t deep = std::clamp<int64_t>(vectors * LANES / (8 * count), 1, vectors);
    const int64_t groups = vectors / deep;  // groups * LANES >= count
    room.keys.resize(groups * LANES);
    for (int64_t group = 0; group < groups; ++group) {
        const float* from = &room.maxima[group * deep * LANES];
        v16 best = load(from);
        for (int64_t i = 1; i < deep; ++i) best = larger(load(from + i * LANES), best);
        store(&room.keys[group * LANES], keys_of(best));
    }
    return float_of(edge_of(room.keys, count, count + count / 4));
}

// Append first + the place of each mark. Most words have few: four at once without a branch.
INLINE void append(uint64_t marks, int64_t first, Room& room) {
    int32_t* id = &room.ids[room.found];
    room.found += __builtin_popcountll(marks);
    for (int k = 0; k < 4; ++k, marks &= marks - 1) {
        *id++ = static_cast<int32_t>(first + __builtin_ctzll(marks | uint64_t{1} << 63));
    }
    for (; __builtin_expect(marks != 0, 0); marks &= marks - 1) {
        *id++ = static_cast<int32_t>(first + __builtin_ctzll(marks));
    }
}

// Finds the ids of x[n], whose maxima the room has, that reach `least`, in order.
void find_reaching(const float* x, int64_t n, float least, Room& room) {
    if (room.ids.size() < static_cast<size_t>(n + 64)) room.ids.resize(n + 64);
    room.found = 0;
    for (int64_t block = 0; block < n / BLOCK; ++block) {
        if (!any(load(&room.maxima[block * LANES]) >= least)) continue;
        for (int64_t i = block * BLOCK; i < (block + 1) * BLOCK; i += 4 * LANES) {
            uint64_t marks = 0;
            for (int64_t k = 0; k < 4; ++k) {
                marks |= static_cast<uint64_t>(bits_of(load(x + i + k * LANES) >= least)) << (k * LANES);
            }
            append(marks, i, room);
        }
    }
    for (int64_t i = n / BLOCK * BLOCK; i < n; ++i) {
        if (x[i] >= least) room.ids[room.found++] = static_cast<int32_t>(i);
    }
}

// Has the values of the found ids in room.values, filled up with -infinity to whole blocks.
void gather(const float* x, Room& room) {
    room.values.resize(whole_blocks(room.found));
    for (int64_t i = 0; i < room.found; ++i) room.values[i] = x[room.ids[i]];
    std::fill(room.values.begin() + room.found, room.values.end(), -INFINITY);
}

// Finds the ids of the `count` largest of x[n] and maybe more, and their values: that of the others is -infinity. Of
// equal ones the lowest ids are kept.
void largest(const float* x, int64_t n, int64_t count, Room& room) {
    find_reaching(x, n, lower_bound_of(count, room), room);
    gather(x, room);
    float* values = room.values.data();
    if (room.found <= count) return;
    room.keys.resize((room.found + LANES - 1) / LANES * LANES);
    for (size_t i = 0; i < room.keys.size(); i += LANES) store(&room.keys[i], keys_of(load(values + i)));
    const int32_t edge = edge_of(room.keys, count, count);
    int64_t reached = 0;
    for (size_t i = 0; i < room.keys.size(); i += LANES) {
        const i16 keep = load(&room.keys[i]) >= edge;
        reached += __builtin_popcount(bits_of(keep));
        store(values + i, keep ? load(values + i) : all(-INFINITY));
    }
    for (int64_t i = room.found; i-- > 0 && reached > count;) {  // of equal ones the last go
        if (room.keys[i] == edge) values[i] = -INFINITY, --reached;
    }
}

}  // namespace
}  // namespace ISA
