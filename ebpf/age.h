// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// One router less: what a router changes in the packets that it carries on. What is written into a packet goes by the
// kernel's function: it copies nothing that nobody else reads.
#pragma once
#include "packet.h"

// How a header of IPv4 begins, up to the last field that a router changes.
struct opening {
    __be32 words[2];
    __u8 time;
    __u8 protocol;
    __sum16 checksum;
};

// Reads how the header at this place of the frame begins, with one router less until its time is over (RFC 1812,
// 5.3.1). The checksum changes with it: RFC 1141.
static __always_inline int
read_aged_ipv4(struct __sk_buff *skb, const struct packet *packet, __u32 at, struct opening *opening) {
    __u32 checksum = packet->checksum + bpf_htons(0x0100);
    opening->time = packet->time - 1;
    opening->protocol = packet->tuple.protocol;
    opening->checksum = checksum + (checksum >= 0xffff);
    return load(skb, at, opening->words, sizeof opening->words);
}

// The same of IPv6, and written where it is in the frame. Unlike IPv4's, this header has no checksum that makes up
// for the change in a device's sum of it all.
static __always_inline int age_ipv6(struct __sk_buff *skb, const struct packet *packet, __u32 at) {
    __u8 time = packet->time - 1;
    return bpf_skb_store_bytes(skb, at + offsetof(struct ipv6hdr, hop_limit), &time, sizeof time,
                               BPF_F_RECOMPUTE_CSUM);
}
