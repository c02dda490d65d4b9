// The quantised block types of GGUF. Each decoder turns 32 weights (a whole block, or one of the
// eight 32-element parts `sub` of a super-block of 256) into eight words of four int8 and the
// numbers that make values of them: w[i] = a[i / 16] * q[i] - m[i / 16].
// Blocks are read from shared memory. Those whose size is a multiple of 16 start on a 16-byte
// boundary, other multiples of four on a four-byte one, other even sizes on an even address.
#pragma once
#include "common.cuh"
#include "grids.cuh"

struct Quants {
    u32 q[8];
    float a0, a1;
    float m0, m1;
};

// A half at an even address: blocks of an even number of bytes only hold such.
__device__ __forceinline__ u16 ld_half(const u8* p) { return *(const u16*)p; }

// N words that start at any byte.
template <int N>
__device__ __forceinline__ void ld_words(const u8* p, u32* out) {
    u32 shift = ((u32)(size_t)p & 3) * 8;
    // By subtraction, so that the compiler still knows it for shared memory.
    const u32* w = (const u32*)(p - ((u32)(size_t)p & 3));
    u32 prev = w[0];
#pragma unroll
    for (int i = 0; i < N; i++) {
        u32 next = w[i + 1];
        out[i] = __funnelshift_r(prev, next, shift);
        prev = next;
    }
}

__device__ __forceinline__ u32 ld32(const u8* p) { return *(const u32*)p; }

// Bits 0..3 of b to bit 0 of each byte.
__device__ __forceinline__ u32 spread4(u32 b) { return ((b & 0xfu) * 0x00204081u) & 0x01010101u; }

// Subtracts the same small constant from four bytes that are below 128.
__device__ __forceinline__ u32 sub_bytes(u32 v, u32 c) {
    return ((v | 0x80808080u) - c) ^ 0x80808080u;
}

// Looks the eight nibbles of q up in a table of sixteen bytes; low nibbles to lo, high to hi.
__device__ __forceinline__ void lookup(u32 q, const u32 (&t)[4], u32& lo, u32& hi) {
    u32 r[2];
#pragma unroll
    for (int k = 0; k < 2; k++) {
        u32 s = q >> (16 * k);
        u32 x = __byte_perm(t[0], t[1], s & 0x7777u);
        u32 y = __byte_perm(t[2], t[3], s & 0x7777u);
        r[k] = __byte_perm(x, y, 0x3210u | ((s & 0x8888u) >> 1));
    }
    lo = __byte_perm(r[0], r[1], 0x6420u);
    hi = __byte_perm(r[0], r[1], 0x7531u);
}

// HALVES: the two halves of 16 have their own factors. MINS: m is used. SHARED: parts that lie in the same
// bytes, APART: two from each other.

struct BQ8_0 {
    static const int ELEMS = 32, BYTES = 34;
    static const int SHARED = 1;
    static const bool APART = false;
    static const bool HALVES = false, MINS = false;
    static __device__ __forceinline__ void scales(const u8* p, int, Quants& o) {
        o.a0 = o.a1 = h2f(ld_half(p));
        o.m0 = o.m1 = 0.0f;
    }
    static __device__ __forceinline__ void decode(const u8* p, int sub, Quants& o) {
        ld_words<8>(p + 2, o.q);
        scales(p, sub, o);
    }
};

__device__ __forceinline__ void nibbles(const u32* qs, Quants& o) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
        o.q[i] = qs[i] & 0x0f0f0f0fu;
        o.q[i + 4] = (qs[i] >> 4) & 0x0f0f0f0fu;
    }
}

__device__ __forceinline__ void fifth_bits(u32 qh, Quants& o) {
#pragma unroll
    for (int i = 0; i < 8; i++) o.q[i] |= spread4(qh >> (4 * i)) << 4;
}

struct BQ4_0 {
    static const int ELEMS = 32, BYTES = 18;
    static const int SHARED = 1;
    static const bool APART = false;
    static const bool HALVES = false, MINS = true;
    static __device__ __forceinline__ void scales(const u8* p, int, Quants& o) {
        o.a0 = o.a1 = h2f(ld_half(p));
        o.m0 = o.m1 = 8.0f * o.a0;
    }
    static __device__ __forceinline__ void decode(const u8* p, int sub, Quants& o) {
        u32 w[4];
        ld_words<4>(p + 2, w);
        nibbles(w, o);
        scales(p, sub, o);
    }
};

struct BQ4_1 {
    static const int ELEMS = 32, BYTES = 20;
    static const int SHARED = 1;
    static const bool APART = false;
    static const bool HALVES = false, MINS = true;
    static __device__ __forceinline__ void scales(const u8* p, int, Quants& o) {
        u32 dm = ld32(p);
        o.a0 = o.a1 = h2f((u16)dm);
        o.m0 = o.m1 = -h2f((u16)(dm >> 16));
    }
    static __device__ __forceinline__ void decode(const u8* p, int sub, Quants& o) {
        u32 w[4] = {ld32(p + 4), ld32(p + 8), ld32(p + 12), ld32(p + 16)};
        nibbles(w, o);
        scales(p, sub, o);
    }
};

struct BQ5_0 {
    static const int ELEMS = 32, BYTES = 22;
    static const int SHARED = 1;
    static const bool APART = false;
    static const bool HALVES = false, MINS = true;
    static __device__ __forceinline__ void scales(const u8* p, int, Quants& o) {
        o.a0 = o.a1 = h2f(ld_half(p));
        o.m0 = o.m1 = 16.0f * o.a0;
    }
    static __device__ __forceinline__ void decode(const u8* p, int sub, Quants& o) {
        u32 w[5];
        ld_words<5>(p + 2, w);
        nibbles(w + 1, o);
        fifth_bits(w[0], o);
        scales(p, sub, o);
    }
};

struct BQ5_1 {
    static const int ELEMS = 32, BYTES = 24;
    static const int SHARED = 1;
    static const bool APART = false;
    static const bool HALVES = false, MINS = true;
    static __device__ __forceinline__ void scales(const u8* p, int, Quants& o) {
        BQ4_1::scales(p, 0, o);
    }
    static __device__ __forceinline__ void decode(const u8* p, int sub, Quants& o) {
        u32 w[4] = {ld32(p + 8), ld32(p + 12), ld32(p + 16), ld32(p + 20)};
        nibbles(w, o);
        fifth_bits(ld32(p + 4), o);
        scales(p, sub, o);
    }
};

struct BIQ4_NL {
    static const int ELEMS = 32, BYTES = 18;
    static const int SHARED = 1;
    static const bool APART = false;
    static const bool HALVES = false, MINS = false;
    static __device__ __forceinline__ void value(u32 w, u32& lo, u32& hi) {
        const u32 t[4] = {0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u};
        lookup(w, t, lo, hi);
    }
    static __device__ __forceinline__ void values(const u32* w, Quants& o) {
#pragma unroll
        for (int i = 0; i < 4; i++) value(w[i], o.q[i], o.q[i + 4]);
    }
    static __device__ __forceinline__ void scales(const u8* p, int, Quants& o) {
        BQ8_0::scales(p, 0, o);
    }
    static __device__ __forceinline__ void decode(const u8* p, int sub, Quants& o) {
        u32 w[4];
        ld_words<4>(p + 2, w);
        values(w, o);
        scales(p, sub, o);
    }
};

struct BMXFP4 {
    static const int ELEMS = 32, BYTES = 17;
    static const int SHARED = 1;
    static const bool APART = false;
    static const bool HALVES = false, MINS = false;
    static __device__ __forceinline__ void value(u32 w, u32& lo, u32& hi) {
        const u32 t[4] = {0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu};
        lookup(w, t, lo, hi);
    }
    static __device__ __forceinline__ void scales(const u8* p, int, Quants& o) {
        // The table holds twice the values, so the scale is 2^(e - 128).
        u32 e = p[0];
        o.a0 = o.a1 = __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
        o.m0 = o.m1 = 0.0f;
    }
    static __device__ __forceinline__ void decode(const u8* p, int sub, Quants& o) {
        u32 w[4];
        ld_words<4>(p + 1, w);
#pragma unroll
        for (int i = 0; i < 4; i++) value(w[i], o.q[i], o.q[i + 4]);
        scales(p, sub, o);
    }
};

struct BQ2_K {
    static const int ELEMS = 256, BYTES = 84;
    static const int SHARED = 4;
    static const bool APART = false;
    static const bool HALVES = true, MINS = true;
    static __device__ __forceinline__ void scales(const u8* p, int sub, Quants& o) {
        u32 dm = ld32(p + 80);
        float d = h2f((u16)dm), dmin = h2f((u16)(dm >> 16));
        u32 s0 = p[2 * sub], s1 = p[2 * sub + 1];
        o.a0 = d * (float)(s0 & 15);
        o.a1 = d * (float)(s1 & 15);
        o.m0 = dmin * (float)(s0 >> 4);
        o.m1 = dmin * (float)(s1 >> 4);
    }
    static __device__ __forceinline__ void decode(const u8* p, int sub, Quants& o) {
        const u8* qs = p + 16 + 32 * (sub >> 2);
        int shift = 2 * (sub & 3);
#pragma unroll
        for (int i = 0; i < 8; i++) o.q[i] = (ld32(qs + 4 * i) >> shift) & 0x03030303u;
        scales(p, sub, o);
    }
};

struct BQ3_K {
    static const int ELEMS = 256, BYTES = 110;
    static const int SHARED = 4;
    static const bool APART = false;
    static const bool HALVES = true, MINS = false;
    static __device__ __forceinline__ float scale(const u8* s, int k) {
        int lo = k < 8 ? s[k] & 15 : s[k - 8] >> 4;
        int hi = (s[8 + (k & 3)] >> (2 * (k >> 2))) & 3;
        return (float)((lo | (hi << 4)) - 32);
    }
    static __device__ __forceinline__ u32 value(u32 w, u32 h, int sub) {
        const u32 q = (w >> (2 * (sub & 3))) & 0x03030303u;
        return sub_bytes(q | ((h >> sub) & 0x01010101u) << 2, 0x04040404u);
    }
    static __device__ __forceinline__ void scales(const u8* p, int sub, Quants& o) {
        float d = h2f(ld_half(p + 108));
        o.a0 = d * scale(p + 96, 2 * sub);
        o.a1 = d * scale(p + 96, 2 * sub + 1);
        o.m0 = o.m1 = 0.0f;
    }
    static __device__ __forceinline__ void decode(const u8* p, int sub, Quants& o) {
        u32 h[8], w[8];
        ld_words<8>(p, h);
        ld_words<8>(p + 32 + 32 * (sub >> 2), w);
#pragma unroll
        for (int i = 0; i < 8; i++) o.q[i] = value(w[i], h[i], sub);
        scales(p, sub, o);
    }
};

// Scale and minimum of part `sub` of Q4_K and Q5_K, times the block's factors: `head` is the first
// 16 bytes of the block, two halves and twelve bytes of packed 6-bit numbers.
__device__ __forceinline__ void scale_min_k4(uint4 head, int sub, Quants& o) {
    const int sh = 8 * (sub & 3);
    const u32 a = head.y >> sh, b = head.z >> sh, c = head.w >> sh;
    const u32 sc = sub < 4 ? a & 63 : (c & 15) | ((a >> 2) & 48);
    const u32 mn = sub < 4 ? b & 63 : ((c >> 4) & 15) | ((b >> 2) & 48);
    o.a0 = o.a1 = h2f((u16)head.x) * (float)sc;
    o.m0 = o.m1 = h2f((u16)(head.x >> 16)) * (float)mn;
}

__device__ __forceinline__ void ld_8words(const u8* p, u32* w) {
    uint4 x = ((const uint4*)p)[0], y = ((const uint4*)p)[1];
    w[0] = x.x, w[1] = x.y, w[2] = x.z, w[3] = x.w;
    w[4] = y.x, w[5] = y.y, w[6] = y.z, w[7] = y.w;
}

struct BQ4_K {
    static const int ELEMS = 256, BYTES = 144;
    static const int SHARED = 2;
    static const bool APART = false;
    static const bool HALVES = false, MINS = true;
    static __device__ __forceinline__ void scales(const u8* p, int sub, Quants& o) {
        scale_min_k4(*(const uint4*)p, sub, o);
    }
    static __device__ __forceinline__ void decode(const u8* p, int sub, Quants& o) {
        ld_8words(p + 16 + 32 * (sub >> 1), o.q);
        int shift = 4 * (sub & 1);
#pragma unroll
        for (int i = 0; i < 8; i++) o.q[i] = (o.q[i] >> shift) & 0x0f0f0f0fu;
        scales(p, sub, o);
    }
};

struct BQ5_K {
    static const int ELEMS = 256, BYTES = 176;
    static const int SHARED = 2;
    static const bool APART = false;
    static const bool HALVES = false, MINS = true;
    static __device__ __forceinline__ u32 value(u32 w, u32 h, int sub) {
        return ((w >> (4 * (sub & 1))) & 0x0f0f0f0fu) | (((h >> sub) & 0x01010101u) << 4);
    }
    static __device__ __forceinline__ void scales(const u8* p, int sub, Quants& o) {
        scale_min_k4(*(const uint4*)p, sub, o);
    }
    static __device__ __forceinline__ void decode(const u8* p, int sub, Quants& o) {
        u32 h[8];
        ld_8words(p + 16, h);
        ld_8words(p + 48 + 32 * (sub >> 1), o.q);
#pragma unroll
        for (int i = 0; i < 8; i++) o.q[i] = value(o.q[i], h[i], sub);
        scales(p, sub, o);
    }
};

struct BQ6_K {
    static const int ELEMS = 256, BYTES = 210;
    static const int SHARED = 2;
    static const bool APART = true;
    static const bool HALVES = true, MINS = false;
    static __device__ __forceinline__ u32 value(u32 l, u32 h, int part) {
        const u32 q = ((l >> (4 * (part >> 1))) & 0x0f0f0f0fu) | (((h >> (2 * part)) & 0x03030303u) << 4);
        return sub_bytes(q, 0x20202020u);
    }
    static __device__ __forceinline__ void scales(const u8* p, int sub, Quants& o) {
        float d = h2f(ld_half(p + 208));
        o.a0 = d * (float)(signed char)p[192 + 2 * sub];
        o.a1 = d * (float)(signed char)p[192 + 2 * sub + 1];
        o.m0 = o.m1 = 0.0f;
    }
    static __device__ __forceinline__ void decode(const u8* p, int sub, Quants& o) {
        int n = sub >> 2, part = sub & 3;
        u32 l[8], h[8];
        ld_words<8>(p + 64 * n + 32 * (part & 1), l);
        ld_words<8>(p + 128 + 32 * n, h);
#pragma unroll
        for (int i = 0; i < 8; i++) o.q[i] = value(l[i], h[i], part);
        scales(p, sub, o);
    }
};

struct BIQ4_XS {
    static const int ELEMS = 256, BYTES = 136;
    static const int SHARED = 1;
    static const bool APART = false;
    static const bool HALVES = false, MINS = false;
    static __device__ __forceinline__ void scales(const u8* p, int sub, Quants& o) {
        u32 dh = ld32(p);
        int lo = (p[4 + (sub >> 1)] >> (4 * (sub & 1))) & 15;
        int hi = (dh >> (16 + 2 * sub)) & 3;
        o.a0 = o.a1 = h2f((u16)dh) * (float)((lo | (hi << 4)) - 32);
        o.m0 = o.m1 = 0.0f;
    }
    static __device__ __forceinline__ void decode(const u8* p, int sub, Quants& o) {
        const u8* qs = p + 8 + 16 * sub;
        u32 w[4] = {ld32(qs), ld32(qs + 4), ld32(qs + 8), ld32(qs + 12)};
        BIQ4_NL::values(w, o);
        scales(p, sub, o);
    }
};

// The grids of the IQ types in shared memory, where lanes that look up different entries wait least for each other. A kernel
// fills those of its type (`fill_grid`) and meets at a barrier before it decodes. `expand` makes an entry of 32 bits of the
// codes' 16.

// Eight codes of IQ1, 0 to 2: the first four in the low halves of the bytes, the other four in the high ones.
struct GridIQ1 {
    static const int WORDS = 2048;
    static __device__ __forceinline__ u32 spread(u32 x) {
        x = (x | x << 12) & 0x000f000fu;
        return (x | x << 6) & 0x03030303u;
    }
    static __device__ __forceinline__ u32 expand(int i) {
        const u32 w = GRID_IQ1[i];
        return spread(w & 255) | spread(w >> 8) << 4;
    }
};

// Eight codes of IQ2, 0 to 2, a nibble each: with bit 2 for the sign, they select bytes of a pair of words.
__device__ __forceinline__ u32 nibbles_of_pairs(u32 x) {
    x = (x | x << 8) & 0x00ff00ffu;
    x = (x | x << 4) & 0x0f0f0f0fu;
    return (x | x << 2) & 0x33333333u;
}
struct GridIQ2_XXS {
    static const int WORDS = 256;
    static __device__ __forceinline__ u32 expand(int i) { return nibbles_of_pairs(GRID_IQ2_XXS[i]); }
};
struct GridIQ2_XS {
    static const int WORDS = 512;
    static __device__ __forceinline__ u32 expand(int i) { return nibbles_of_pairs(GRID_IQ2_XS[i]); }
};
struct GridIQ2_S {
    static const int WORDS = 1024;
    static __device__ __forceinline__ u32 expand(int i) { return nibbles_of_pairs(GRID_IQ2_S[i]); }
};

// Four values of IQ3, a byte each.
__device__ __forceinline__ u32 bytes_of_nibbles(u32 x) {
    x = (x | x << 8) & 0x00ff00ffu;
    return (x | x << 4) & 0x0f0f0f0fu;
}
struct GridIQ3_XXS {
    static const int WORDS = 256;
    // 4, 12, … 52, 62.
    static __device__ __forceinline__ u32 expand(int i) {
        const u32 c = bytes_of_nibbles(GRID_IQ3_XXS[i]);
        return c * 8 + 0x04040404u + ((c & c >> 1 & c >> 2) & 0x01010101u) * 2;
    }
};
struct GridIQ3_S {
    static const int WORDS = 512;
    // Odd numbers.
    static __device__ __forceinline__ u32 expand(int i) { return bytes_of_nibbles(GRID_IQ3_S[i]) * 2 + 0x01010101u; }
};

template <class G>
__device__ __forceinline__ u32* grid_words() {
    __shared__ u32 words[G::WORDS + 1];
    return words;
}
template <class G>
__device__ __forceinline__ void fill(int tid, int threads) {
    u32* words = grid_words<G>();
    for (int i = tid; i < G::WORDS; i += threads) words[i] = G::expand(i);
    if (tid == 0) words[G::WORDS] = 0x002b1908u;
}
template <class G>
__device__ __forceinline__ u32 entry(u32 at) {
    return grid_words<G>()[at];
}
// The values of IQ2, from memory: a constant would be brought to a register anew for each use.
template <class G>
__device__ __forceinline__ u32 iq2_low() {
    return grid_words<G>()[G::WORDS];
}

// N words that start at any even byte.
template <int N>
__device__ __forceinline__ void ld_halves(const u8* p, u32* out) {
    const u16* h = (const u16*)p;
#pragma unroll
    for (int i = 0; i < N; i++) out[i] = h[2 * i] | (u32)h[2 * i + 1] << 16;
}

// What `prmt` does with four bits of a selector: bit 3 fills a byte with its sign. (__byte_perm cuts them to three bits, which
// costs an instruction.)
__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selector) {
    u32 r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(selector));
    return r;
}

// Byte l of a word.
__device__ __forceinline__ u32 byte_of(u32 w, int l) { return __byte_perm(w, 0, 0x4440u | l); }

// Eight signs for `iq2_eight`, to bits 2 to 11 of two halves: the seven of a word, and an eighth by which an even number of
// them is negative. By multiplications rather than shifts: they have a pipe of their own.
__device__ __forceinline__ u32 iq2_even(u32 seven) { return seven * 0x4004u + __popc(seven) * (128 * 0x4004u); }
// Eight signs of IQ2_S.
__device__ __forceinline__ u32 iq2_signs(u32 eight) { return eight * 0x4004u; }

// Eight values of IQ2: an entry of a grid, and eight signs. `low` are the values 8, 25 and 43.
__device__ __forceinline__ void iq2_eight(u32 low, u32 codes, u32 signs, u32* q) {
    u32 x = signs & 0x003c003cu;
    x = (x * 0x41u) & 0x0c0c0c0cu;
    x = ((x * 9u) & 0x44444444u) | codes;
    q[0] = permute(low, 0x00d5e7f8u, x);
    q[1] = permute(low, 0x00d5e7f8u, x >> 16);
}
// Seven signs and the eighth; two bits above that mean nothing.
__device__ __forceinline__ u32 even_signs(u32 seven) { return seven + __popc(seven) * 128; }

// Four values of IQ3_XXS with the signs in the lowest four bits of at most seven. The complement of a value is below 255:
// adding 1 carries to no other byte.
__device__ __forceinline__ u32 iq3_xxs_four(u32 values, u32 signs) {
    const u32 s = (signs * 0x00204081u) & 0x01010101u;
    return (values ^ (s * 255u)) + s;
}
// Four values of IQ3_S likewise: those of an odd number differ from their negatives in all bits but the lowest.
__device__ __forceinline__ u32 iq3_s_four(u32 values, u32 signs) {
    const u32 m = permute((signs & 15) * 0x10204080u, 0, 0xba98u);
    return values ^ (m & 0xfefefefeu);
}

// Types with grids: 256 elements of which each 32 have bytes of their own.
struct Gridded {
    static const int ELEMS = 256;
    static const int SHARED = 1;
    static const bool APART = false;
};

struct BIQ1_S : Gridded {
    static const int BYTES = 50;
    static const bool HALVES = false, MINS = true;
    static __device__ __forceinline__ void decode(const u8* p, int sub, Quants& o) {
        u32 low;
        ld_halves<1>(p + 2 + 4 * sub, &low);
        const u32 high = *(const u16*)(p + 34 + 2 * sub);
#pragma unroll
        for (int l = 0; l < 4; l++) {
            const u32 e = entry<GridIQ1>(byte_of(low, l) | ((l < 3 ? high << (8 - 3 * l) : high >> 1) & 0x700u));
            o.q[2 * l] = e & 0x0f0f0f0fu;
            o.q[2 * l + 1] = (e >> 4) & 0x0f0f0f0fu;
        }
        o.a0 = o.a1 = h2f(ld_half(p)) * (float)(2 * ((high >> 12) & 7) + 1);
        o.m0 = o.m1 = o.a0 * (high >> 15 ? 1.125f : 0.875f);
    }
};

struct BIQ1_M : Gridded {
    static const int BYTES = 56;
    static const bool HALVES = true, MINS = true;
    static __device__ __forceinline__ void decode(const u8* p, int sub, Quants& o) {
        const u32 low = ld32(p + 4 * sub), high = *(const u16*)(p + 32 + 2 * sub);
#pragma unroll
        for (int l = 0; l < 4; l++) {
            const u32 e = entry<GridIQ1>(byte_of(low, l) | ((l < 2 ? high << (8 - 4 * l) : high >> (4 * l - 8)) & 0x700u));
            // Eighths, 9 above the value with its offset of an eighth up or down.
            const u32 up = (high >> (4 * l)) & 8 ? 0u : 0x02020202u;
            o.q[2 * l] = (e & 0x0f0f0f0fu) * 8 + up;
            o.q[2 * l + 1] = ((e >> 4) & 0x0f0f0f0fu) * 8 + up;
        }
        const u32 s = ld32(p + 48), t = ld32(p + 52);
        const u32 d = (s >> 12 & 0x000fu) | (s >> 24 & 0x00f0u) | (t >> 4 & 0x0f00u) | (t >> 16 & 0xf000u);
        const u32 scales = (sub < 4 ? s : t) >> (16 * (sub >> 1 & 1) + 6 * (sub & 1));
        const float eighth = 0.125f * h2f((u16)d);
        o.a0 = eighth * (float)(2 * (scales & 7) + 1);
        o.a1 = eighth * (float)(2 * (scales >> 3 & 7) + 1);
        o.m0 = 9.0f * o.a0;
        o.m1 = 9.0f * o.a1;
    }
};

// A scale of IQ2 and IQ3_XXS: 4 bits and a half.
__device__ __forceinline__ float half_more(u32 s) { return (float)(s & 15) + 0.5f; }

struct BIQ2_XXS : Gridded {
    static const int BYTES = 66;
    static const bool HALVES = false, MINS = false;
    static __device__ __forceinline__ void decode(const u8* p, int sub, Quants& o) {
        u32 w[2];
        ld_halves<2>(p + 2 + 8 * sub, w);
        const u32 low = iq2_low<GridIQ2_XXS>();
#pragma unroll
        for (int l = 0; l < 4; l++)
            iq2_eight(low, entry<GridIQ2_XXS>(byte_of(w[0], l)), iq2_even(w[1] >> (7 * l) & 127), o.q + 2 * l);
        o.a0 = o.a1 = 0.25f * h2f(ld_half(p)) * half_more(w[1] >> 28);
        o.m0 = o.m1 = 0.0f;
    }
};

// The two scales of a part of IQ2_XS and IQ2_S.
__device__ __forceinline__ void scales_iq2(const u8* p, u32 byte, Quants& o) {
    const float d = 0.25f * h2f(ld_half(p));
    o.a0 = d * half_more(byte);
    o.a1 = d * half_more(byte >> 4);
    o.m0 = o.m1 = 0.0f;
}

struct BIQ2_XS : Gridded {
    static const int BYTES = 74;
    static const bool HALVES = true, MINS = false;
    static __device__ __forceinline__ void decode(const u8* p, int sub, Quants& o) {
        const u16* w = (const u16*)(p + 2 + 8 * sub);
        const u32 low = iq2_low<GridIQ2_XS>();
#pragma unroll
        for (int l = 0; l < 4; l++)
            iq2_eight(low, entry<GridIQ2_XS>(w[l] & 511), iq2_even(w[l] >> 9), o.q + 2 * l);
        scales_iq2(p, p[66 + sub], o);
    }
};

struct BIQ2_S : Gridded {
    static const int BYTES = 82;
    static const bool HALVES = true, MINS = false;
    static __device__ __forceinline__ void decode(const u8* p, int sub, Quants& o) {
        u32 w, signs;
        ld_halves<1>(p + 2 + 4 * sub, &w);
        ld_halves<1>(p + 34 + 4 * sub, &signs);
        const u32 low = iq2_low<GridIQ2_S>(), high = p[66 + sub];
#pragma unroll
        for (int l = 0; l < 4; l++) {
            const u32 e = entry<GridIQ2_S>(byte_of(w, l) | ((high << (8 - 2 * l)) & 0x300u));
            iq2_eight(low, e, iq2_signs(byte_of(signs, l)), o.q + 2 * l);
        }
        scales_iq2(p, p[74 + sub], o);
    }
};

struct BIQ3_XXS : Gridded {
    static const int BYTES = 98;
    static const bool HALVES = false, MINS = false;
    static __device__ __forceinline__ void decode(const u8* p, int sub, Quants& o) {
        u32 w[2], codes;
        ld_halves<2>(p + 2 + 8 * sub, w);
        ld_halves<1>(p + 66 + 4 * sub, &codes);
#pragma unroll
        for (int l = 0; l < 4; l++) {
            const u32 seven = codes >> (7 * l) & 127, at = 2 * (l & 1);
            o.q[2 * l] = iq3_xxs_four(entry<GridIQ3_XXS>(byte_of(w[l >> 1], at)), seven);
            o.q[2 * l + 1] = iq3_xxs_four(entry<GridIQ3_XXS>(byte_of(w[l >> 1], at + 1)), even_signs(seven) >> 4);
        }
        o.a0 = o.a1 = 0.5f * h2f(ld_half(p)) * half_more(codes >> 28);
        o.m0 = o.m1 = 0.0f;
    }
};

struct BIQ3_S : Gridded {
    static const int BYTES = 110;
    static const bool HALVES = false, MINS = false;
    static __device__ __forceinline__ void decode(const u8* p, int sub, Quants& o) {
        u32 w[2], signs;
        ld_halves<2>(p + 2 + 8 * sub, w);
        ld_halves<1>(p + 74 + 4 * sub, &signs);
        const u32 high = p[66 + sub];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            const u32 e = entry<GridIQ3_S>(byte_of(w[i >> 2], i & 3) | ((high << (8 - i)) & 0x100u));
            o.q[i] = iq3_s_four(e, signs >> (4 * i));
        }
        o.a0 = o.a1 = h2f(ld_half(p)) * (float)(2 * (p[106 + (sub >> 1)] >> (4 * (sub & 1)) & 15) + 1);
        o.m0 = o.m1 = 0.0f;
    }
};

// Fills the table that the type's decoder reads, by `threads` threads of the block; none for most types.
template <class B>
__device__ __forceinline__ void fill_grid(int, int) {}
#define FILLS(T, G)                                                              \
    template <>                                                                  \
    __device__ __forceinline__ void fill_grid<B##T>(int tid, int threads) {      \
        fill<Grid##G>(tid, threads);                                             \
    }
FILLS(IQ1_S, IQ1) FILLS(IQ1_M, IQ1) FILLS(IQ2_XXS, IQ2_XXS) FILLS(IQ2_XS, IQ2_XS) FILLS(IQ2_S, IQ2_S)
FILLS(IQ3_XXS, IQ3_XXS) FILLS(IQ3_S, IQ3_S)

#define FOR_EACH_QUANT(X) \
    X(Q8_0) X(Q4_0) X(Q4_1) X(Q5_0) X(Q5_1) X(Q2_K) X(Q3_K) X(Q4_K) X(Q5_K) X(Q6_K) \
    X(IQ4_NL) X(IQ4_XS) X(MXFP4) \
    X(IQ1_S) X(IQ1_M) X(IQ2_XXS) X(IQ2_XS) X(IQ2_S) X(IQ3_XXS) X(IQ3_S)

// Word i of a part as four values. Bytes become floats by way of a mantissa: conversions run at an eighth of the rate.
template <class B>
__device__ __forceinline__ void values_of(const Quants& q, int i, float (&f)[4]) {
    const u32 biased = q.q[i] ^ 0x80808080u;
    const float a = i < 4 ? q.a0 : q.a1, m = i < 4 ? q.m0 : q.m1;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float v = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7440u | j)) - 8388736.0f;
        f[j] = B::MINS ? __fmaf_rn(a, v, -m) : __fmul_rn(a, v);
    }
}

// Bytes of 1024 consecutive weights, and a buffer for them that allows for copies in whole
// 16-byte lines from a start on any byte.
template <class B>
struct Step {
    static const int BYTES = 1024 / B::ELEMS * B::BYTES;
    static const int BUF = (BYTES + 30) / 16 * 16;
};

// Where `stage` puts the first byte of src in its buffer.
template <class B>
__device__ __forceinline__ int staged_at(const u8* src) {
    return B::BYTES % 16 == 0 ? 0 : (int)((size_t)src & 15);
}

// Starts the copy of `len` bytes at src to a buffer of Step::BUF bytes; they will lie at
// buf + staged_at(src). Reads whole 16-byte lines: up to 15 bytes before and after the span, never
// beyond the lines that hold its first and last byte. Blocks of whole lines in a file that does not
// keep them on lines go word by word.
template <class B>
__device__ __forceinline__ void stage(u8* buf, const u8* src, int len, int lane) {
    if (B::BYTES % 16 == 0 && ((size_t)src & 15) != 0) {
        for (int c = lane * 4; c < len; c += 128) cp_async4(buf + c, src + c);
        return;
    }
    const u8* first = (const u8*)((size_t)src & ~(size_t)15);
    const int lines = (int)((src + len + 15 - first) >> 4);
    buf += 16 * lane;
    first += 16 * lane;
#pragma unroll
    for (int i = 0; i < (Step<B>::BUF / 16 + 31) / 32; i++)
        if (lane + 32 * i < lines) cp_async16(buf + 512 * i, first + 512 * i);
}
