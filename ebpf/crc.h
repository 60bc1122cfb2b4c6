// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// The checksum of SCTP (CRC-32C, RFC 9260, appendix A): what it becomes when the ports change. It is
// linear: the change of the ports, as if it stood alone in a packet of zeros, is the change of the sum.
#pragma once
#include "packet.h"

// The polynomial, and x to the power of 8, both with the lowest power in the highest bit.
#define POLYNOMIAL 0x82f63b78
#define ONE_BYTE 0x00800000

// Two polynomials multiplied, modulo the polynomial.
SEPARATE __u32 multiply(__u32 a, __u32 b) {
    __u32 product = 0;
    for (int bit = 0; bit < 32; bit++) {
        product ^= b & -(a >> 31);
        a <<= 1;
        b = (b >> 1) ^ (POLYNOMIAL & -(b & 1));
    }
    return product;
}

// Puts the checksum right after the ports have changed: `change` is the exclusive or of their four bytes.
static __always_inline int
rewrite_crc(struct __sk_buff *skb, const struct packet *packet, __u32 change) {
    __u32 at = packet->transport + offsetof(struct sctp, checksum), sum;
    if (bpf_skb_load_bytes(skb, at, &sum, sizeof sum))
        return -1;
    // It is made when the packet leaves the stack.
    if (!sum)
        return 0;
    __u32 length = (skb->len - packet->transport) & 0xffff, power = ONE_BYTE;
    for (int bit = 0; bit < 16; bit++) {
        if (length & 1)
            change = multiply(change, power);
        power = multiply(power, power);
        length >>= 1;
    }
    sum ^= change;
    return bpf_skb_store_bytes(skb, at, &sum, sizeof sum, 0);
}
