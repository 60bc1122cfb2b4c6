// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// Other addresses and ports for a packet, and checksums that are right (RFC 1624).
#pragma once
#include "crc.h"

// Where the checksum of a transport is in its header; 0: it covers no addresses and is not ours to change.
static __always_inline __u32 checksum_at(__u8 protocol) {
    if (protocol == IPPROTO_TCP)
        return offsetof(struct tcphdr, check);
    if (protocol == IPPROTO_UDP)
        return offsetof(struct udphdr, check);
    return 0;
}

// One address of an IPv4 packet; `at` is its place in the header.
static __always_inline int rewrite_ipv4(
    struct __sk_buff *skb, const struct packet *packet, __u32 at, __u32 checksum, __be32 old, __be32 new) {
    __u64 mangled = packet->tuple.protocol == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
    if (old == new)
        return 0;
    if (checksum &&
        bpf_l4_csum_replace(skb, checksum, old, new, BPF_F_PSEUDO_HDR | mangled | sizeof new))
        return -1;
    if (bpf_l3_csum_replace(skb, ETH_HLEN + offsetof(struct iphdr, check), old, new, sizeof new))
        return -1;
    return bpf_skb_store_bytes(skb, ETH_HLEN + at, &new, sizeof new, 0);
}

static __always_inline int rewrite_ipv6(
    struct __sk_buff *skb,
    const struct packet *packet,
    __u32 at,
    __u32 checksum,
    struct address *old,
    struct address *new) {
    __u64 mangled = packet->tuple.protocol == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
    if (same(old, new))
        return 0;
    if (checksum) {
        __s64 sum = bpf_csum_diff(old->words, sizeof *old, new->words, sizeof *new, 0);
        if (sum < 0 || bpf_l4_csum_replace(skb, checksum, 0, sum, BPF_F_PSEUDO_HDR | mangled))
            return -1;
    }
    return bpf_skb_store_bytes(skb, ETH_HLEN + at, new, sizeof *new, BPF_F_RECOMPUTE_CSUM);
}

static __always_inline int rewrite_port(
    struct __sk_buff *skb, const struct packet *packet, __u32 at, __u32 checksum, __be16 old, __be16 new) {
    __u64 mangled = packet->tuple.protocol == IPPROTO_UDP ? BPF_F_MARK_MANGLED_0 : 0;
    if (old == new)
        return 0;
    if (checksum && bpf_l4_csum_replace(skb, checksum, old, new, mangled | sizeof new))
        return -1;
    return bpf_skb_store_bytes(skb, packet->transport + at, &new, sizeof new, 0);
}

// Gives a packet the addresses and ports of a connection.
SEPARATE int rewrite(struct __sk_buff *skb, struct packet *packet, struct connection *connection) {
    if (!packet || !connection)
        return -1;
    struct tuple *old = &packet->tuple;
    __u32 checksum = packet->whole ? checksum_at(old->protocol) : 0;
    if (checksum)
        checksum += packet->transport;
    if (packet->ipv4) {
        if (rewrite_ipv4(skb, packet, offsetof(struct iphdr, saddr), checksum, old->source.words[3],
                         connection->source.words[3]) ||
            rewrite_ipv4(skb, packet, offsetof(struct iphdr, daddr), checksum, old->destination.words[3],
                         connection->destination.words[3]))
            return -1;
    } else if (rewrite_ipv6(skb, packet, offsetof(struct ipv6hdr, saddr), checksum, &old->source,
                            &connection->source) ||
               rewrite_ipv6(skb, packet, offsetof(struct ipv6hdr, daddr), checksum, &old->destination,
                            &connection->destination)) {
        return -1;
    }
    if (!packet->whole)
        return 0;
    if (old->protocol == IPPROTO_SCTP) {
        // As they lie in the packet, the first in the lower half.
        __u32 change = (__u32)(old->destination_port ^ connection->destination_port) << 16 |
                       (__u16)(old->source_port ^ connection->source_port);
        // The checksum is of all fragments together, and how long they are only the last one tells.
        if (change && packet->fragment)
            refuse(packet, EVENT_FRAGMENTS);
        if (change && (packet->fragment || rewrite_crc(skb, packet, change)))
            return -1;
    }
    // Ports are at the same place for all.
    return rewrite_port(skb, packet, 0, checksum, old->source_port, connection->source_port) ||
           rewrite_port(skb, packet, 2, checksum, old->destination_port, connection->destination_port);
}
