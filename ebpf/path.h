// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// The path that skips the stack: from container to container on a node, and to the device by which the
// tunnel's packets leave. What a packet needs beyond being carried on the kernel does, as without us.
#pragma once
#include "answer.h"
#include "tunnel.h"

static __always_inline struct meaning *meaning_of(__u32 network, const struct address *address) {
    struct place place = {.network = network, .address = *address};
    return bpf_map_lookup_elem(&addresses, &place);
}

static __always_inline struct way *way_to(__u32 network, const struct address *address) {
    struct range range = {.bits = 8 * (sizeof range - sizeof range.bits), .network = network};
    range.address = *address;
    return bpf_map_lookup_elem(&ways, &range);
}

// Whether a packet, or each that a large one is cut into, is no longer than a way takes.
static __always_inline bool
fits(struct __sk_buff *skb, const struct packet *packet, __u32 at, __u32 mtu) {
    __u32 size = skb->gso_size;
    __u8 words;
    if (!size)
        return skb->len - at <= mtu;
    size += packet->transport - at;
    if (packet->tuple.protocol == IPPROTO_UDP)
        return size + sizeof(struct udphdr) <= mtu;
    // The upper half of byte 12 is the length of the header in words (RFC 9293, 3.1).
    if (load(skb, packet->transport + 12, &words, sizeof words))
        return false;
    return size + (words >> 4) * 4 <= mtu;
}

// The part of a header that a router changes, from the time that a packet has. What is written into a packet
// goes by the kernel's function: it copies nothing that nobody else reads.
struct aged_ipv4 {
    __u8 time;
    __u8 protocol;
    __sum16 checksum;
};

// One router less until its time is over (RFC 1812, 5.3.1). The checksum changes with it: RFC 1141.
static __always_inline int age(struct __sk_buff *skb, const struct packet *packet, __u32 at) {
    __u8 time = packet->time - 1;
    if (!packet->ipv4)
        // Unlike IPv4's, this header has no checksum that makes up for the change in a device's sum of it all.
        return bpf_skb_store_bytes(skb, at + offsetof(struct ipv6hdr, hop_limit), &time, sizeof time,
                                   BPF_F_RECOMPUTE_CSUM);
    __u32 checksum = packet->checksum + bpf_htons(0x0100);
    struct aged_ipv4 aged = {time, packet->tuple.protocol, checksum + (checksum >= 0xffff)};
    return bpf_skb_store_bytes(skb, at + offsetof(struct iphdr, ttl), &aged, sizeof aged, 0);
}

// The frame of a packet is for a container, from the router that it came to.
static __always_inline int address_frame(
    struct __sk_buff *skb, const struct mac *to, const struct mac *router, __be16 protocol) {
    struct frame frame = {*to, *router, protocol};
    return bpf_skb_store_bytes(skb, 0, &frame, sizeof frame, 0);
}

// Brings a packet of a container of this network to another of this node.
static __always_inline int deliver(struct __sk_buff *skb, struct packet *packet, const struct meaning *to) {
    struct mac router;
    if (load(skb, 0, &router, sizeof router))
        return PASS;
    if (age(skb, packet, ETH_HLEN) || address_frame(skb, &to->mac, &router, skb->protocol) ||
        (to->balances && translate_answer(skb, packet)))
        return lost(packet);
    return bpf_redirect_peer(to->interface, 0);
}

// Puts a packet into the tunnel, and across into the host's namespace.
static __always_inline int
encapsulate(struct __sk_buff *skb, struct packet *packet, const struct way *way) {
    struct tunnel tunnel = {
        .way = way,
        .network = packet->tuple.network,
        .length = skb->len,
        .hash = bpf_get_hash_recalc(skb),
        .protocol = skb->protocol,
        .congestion = packet->congestion,
    };
    __u64 flags = BPF_F_ADJ_ROOM_FIXED_GSO | BPF_F_ADJ_ROOM_ENCAP_L4_UDP |
                  BPF_F_ADJ_ROOM_ENCAP_L2(ETH_HLEN) | BPF_F_ADJ_ROOM_ENCAP_L2_ETH;
    __u32 room;
    // What is in a tunnel of the container's own already, the kernel puts into ours.
    if (is_mapped(&way->remote)) {
        room = sizeof(struct iphdr) + TUNNEL_HEADERS;
        if (bpf_skb_adjust_room(skb, room, BPF_ADJ_ROOM_MAC, flags | BPF_F_ADJ_ROOM_ENCAP_L3_IPV4))
            return PASS;
        if (write_ipv4(skb, &tunnel))
            return lost(packet);
    } else {
        room = sizeof(struct ipv6hdr) + TUNNEL_HEADERS;
        if (bpf_skb_adjust_room(skb, room, BPF_ADJ_ROOM_MAC, flags | BPF_F_ADJ_ROOM_ENCAP_L3_IPV6))
            return PASS;
        if (write_ipv6(skb, &tunnel))
            return lost(packet);
    }
    if (age(skb, packet, ETH_HLEN + room))
        return lost(packet);
    return bpf_redirect_peer(way->crossing, 0);
}

// Sends a packet of a container on past the stack, where that does all that the stack would. `is_elsewhere`:
// its destination means nothing on this node.
SEPARATE int send(struct __sk_buff *skb, struct packet *packet, __u32 is_elsewhere) {
    if (!packet || !packet->plain || skb->pkt_type != PACKET_HOST)
        return PASS;
    __u32 network = packet->tuple.network;
    struct address address = packet->tuple.source;
    struct meaning *from = meaning_of(network, &address);
    // Whoever speaks for another is the kernel's to refuse.
    if (!from || from->kind != ADDRESS_CONTAINER || from->interface != skb->ifindex)
        return PASS;
    address = packet->tuple.destination;
    struct meaning *meaning = is_elsewhere ? NULL : meaning_of(network, &address);
    if (meaning) {
        // Its entry may become another's as soon as the agent writes.
        struct meaning to = *meaning;
        if (to.kind != ADDRESS_CONTAINER || to.interface == skb->ifindex || !to.interface ||
            !fits(skb, packet, ETH_HLEN, to.mtu))
            return PASS;
        return deliver(skb, packet, &to);
    }
    struct way *way = way_to(network, &address);
    if (!way || !way->crossing || !fits(skb, packet, ETH_HLEN, way->mtu))
        return PASS;
    return encapsulate(skb, packet, way);
}
