// SPDX-License-Identifier: Apache-2.0 OR MIT OR GPL-2.0-only
// What a packet is: addresses, ports, and where its headers are.
#pragma once
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <stdbool.h>
#include <stddef.h>

#include "maps.h"

// The packet goes the way that it would go without us: to the next program, then to the kernel.
#define PASS TC_ACT_UNSPEC

// A packet is for the device that it came by (linux/if_packet.h pulls in the C library).
#define PACKET_HOST 0

#define FRAGMENT_OFFSET 0x1fff
#define FRAGMENT_MORE 0x2000
// How many extension headers are read (RFC 8200, 4.1 has six).
#define EXTENSIONS 6

struct packet {
    struct tuple tuple;
    // Where the header after the addresses is, from the start of the frame.
    __u32 transport;
    bool ipv4;
    // Whether that header is in this packet: of a datagram in fragments, in the first only.
    bool whole;
    bool fragment;
    // Of TCP: byte 13 of its header (RFC 9293, 3.1).
    __u8 tcp_flags;
    __be32 fragment_id;
    // Whether it needs nothing of the kernel's but to be carried on: neither options nor fragments, nor the
    // error that says that its time is over.
    bool plain;
    // For how many routers more it has time.
    __u8 time;
    // Two bits about congestion (RFC 3168, 5).
    __u8 congestion;
    // Of IPv4: of its header.
    __sum16 checksum;
    // Why it was not carried: one more than the event.
    __u8 reason;
    // Whether it is among those that are shown although they go their way.
    bool is_shown;
    // Whether it is of a balanced connection: then where it leads, or from where it came, in truth or in show.
    bool is_translated;
    __be16 translated_port;
    struct address translated;
};

// Counts why a packet is not carried, or not as it wanted to be.
static __always_inline void refuse(struct packet *packet, __u32 event) {
    packet->reason = event + 1;
    note(event);
}

// Drops a packet that could not be changed; where nothing else was the reason there was no memory for it.
static __always_inline int lost(struct packet *packet) {
    if (!packet->reason)
        refuse(packet, EVENT_NO_MEMORY);
    return TC_ACT_SHOT;
}

static __always_inline void
note_translation(struct packet *packet, const struct address *address, __be16 port) {
    packet->translated = *address;
    packet->translated_port = port;
    packet->is_translated = true;
}

// The header of a frame (IEEE 802.3, 3.1.1), in words.
struct frame {
    struct mac destination;
    struct mac source;
    __be16 protocol;
};

// What a router on the way sets in both bits.
#define CONGESTION 3

// The common header of SCTP (RFC 9260, 3.1).
struct sctp {
    __be16 source;
    __be16 destination;
    __be32 tag;
    __le32 checksum;
};

#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_ACK 16

// How far into a frame headers are looked for in place: the verifier wants a bound.
#define IN_PLACE 4096

// Reads a part of a frame. Where it lies in one piece with the frame's start it is read in place, which costs a
// fraction of having the kernel look for it. It is said to be aligned, or each byte would be read by itself; the
// verifier refuses that where a machine cannot read what is not.
static __always_inline int load(struct __sk_buff *skb, __u32 at, void *to, __u32 size) {
    void *start = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
    if (at < IN_PLACE && start + at + size <= end) {
        __builtin_memcpy(to, __builtin_assume_aligned(start + at, 4), size);
        return 0;
    }
    return bpf_skb_load_bytes(skb, at, to, size);
}

// Whether a length is in these bounds, in a way that the verifier understands: the compiler would compare once, with
// another number. And that something is not 0 does not tell Linux 6.1 that it is more.
static __always_inline bool is_between(__u32 *length, __u32 least, __u32 most) {
    __u32 known = *length;
    if (known > most)
        return false;
    asm volatile("" : "+r"(known));
    *length = known;
    return known >= least;
}

static __always_inline __u16 fold(__u32 sum) {
    sum = (sum & 0xffff) + (sum >> 16);
    return (sum & 0xffff) + (sum >> 16);
}

// The checksum of a header without options (RFC 1071).
static __always_inline __sum16 checksum_of(const struct iphdr *ip) {
    const __u16 *words = (const __u16 *)ip;
    __u32 sum = 0;
#pragma unroll
    for (int word = 0; word < 10; word++)
        sum += words[word];
    return ~fold(sum);
}

// Has a frame go back to who has sent it.
static __always_inline int turn_frame(struct __sk_buff *skb) {
    struct frame frame;
    if (load(skb, 0, &frame, sizeof frame))
        return -1;
    struct frame back = {frame.source, frame.destination, frame.protocol};
    return bpf_skb_store_bytes(skb, 0, &back, sizeof back, 0);
}

static __always_inline void map_ipv4(struct address *to, __be32 address) {
    to->halves[0] = 0;
    to->words[2] = bpf_htonl(0xffff);
    to->words[3] = address;
}

static __always_inline bool same(const struct address *a, const struct address *b) {
    return a->halves[0] == b->halves[0] && a->halves[1] == b->halves[1];
}

static __always_inline bool same_mac(const struct mac *a, const struct mac *b) {
    return a->words[0] == b->words[0] && a->words[1] == b->words[1] && a->words[2] == b->words[2];
}

static __always_inline void copy_ipv6(struct address *to, const struct in6_addr *from) {
    __builtin_memcpy(to, from, sizeof *to);
}

// Whether an address stands for one of IPv4: such are in no packet of IPv6 (RFC 4942, 2.2).
static __always_inline bool is_mapped(const struct address *address) {
    return !address->halves[0] && address->words[2] == bpf_htonl(0xffff);
}

static __always_inline bool is_of_ports(__u8 protocol) {
    return protocol == IPPROTO_TCP || protocol == IPPROTO_UDP;
}

static __always_inline int read_ipv4(struct __sk_buff *skb, struct packet *packet, __u32 at) {
    struct iphdr ip;
    if (load(skb, at, &ip, sizeof ip) || ip.version != 4 || ip.ihl < 5)
        return -1;
    map_ipv4(&packet->tuple.source, ip.saddr);
    map_ipv4(&packet->tuple.destination, ip.daddr);
    packet->ipv4 = true;
    packet->tuple.protocol = ip.protocol;
    packet->transport = at + ip.ihl * 4;
    packet->fragment = ip.frag_off & bpf_htons(FRAGMENT_MORE | FRAGMENT_OFFSET);
    packet->whole = !(ip.frag_off & bpf_htons(FRAGMENT_OFFSET));
    packet->fragment_id = ip.id;
    packet->plain = ip.ihl == 5 && ip.ttl > 1 && !packet->fragment && is_of_ports(ip.protocol);
    packet->time = ip.ttl;
    packet->congestion = ip.tos & CONGESTION;
    packet->checksum = ip.check;
    return 0;
}

// The headers that stand between that of IPv6 and the transport's.
struct extension {
    __u8 next;
    // In units of 8 bytes, without the first.
    __u8 length;
    __be16 fragment;
    __be32 fragment_id;
};

static __always_inline int read_ipv6(struct __sk_buff *skb, struct packet *packet, __u32 at) {
    struct ipv6hdr ip;
    struct extension extension;
    if (load(skb, at, &ip, sizeof ip) || ip.version != 6)
        return -1;
    copy_ipv6(&packet->tuple.source, &ip.saddr);
    copy_ipv6(&packet->tuple.destination, &ip.daddr);
    if (is_mapped(&packet->tuple.source) || is_mapped(&packet->tuple.destination))
        return -1;
    packet->whole = true;
    packet->plain = ip.hop_limit > 1 && is_of_ports(ip.nexthdr);
    packet->time = ip.hop_limit;
    packet->congestion = ip.flow_lbl[0] >> 4 & CONGESTION;
    at += sizeof ip;
    __u8 next = ip.nexthdr;
    for (int count = 0; count < EXTENSIONS; count++) {
        if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_DSTOPTS &&
            next != IPPROTO_FRAGMENT)
            break;
        if (bpf_skb_load_bytes(skb, at, &extension, sizeof extension))
            return -1;
        if (next == IPPROTO_FRAGMENT) {
            packet->fragment = true;
            packet->fragment_id = extension.fragment_id;
            packet->whole = !(extension.fragment & bpf_htons(0xfff8));
            at += sizeof extension;
        } else {
            at += (extension.length + 1) * 8;
        }
        next = extension.next;
        if (!packet->whole)
            break;
    }
    packet->tuple.protocol = next;
    packet->transport = at;
    return 0;
}

static __always_inline struct fragment_key
fragment_key(struct __sk_buff *skb, const struct packet *packet) {
    return (struct fragment_key){
        .network = packet->tuple.network,
        .interface = skb->ifindex,
        .source = packet->tuple.source,
        .destination = packet->tuple.destination,
        .id = packet->fragment_id,
        .protocol = packet->tuple.protocol,
    };
}

// Separate for its key: callers have little room left on the stack.
SEPARATE int remember_ports(struct __sk_buff *skb, struct packet *packet) {
    if (!packet)
        return -1;
    struct fragment_key key = fragment_key(skb, packet);
    struct ports ports = {packet->tuple.source_port, packet->tuple.destination_port};
    return bpf_map_update_elem(&fragments, &key, &ports, BPF_ANY);
}

// Remembers the ports of a first fragment that belongs to a connection.
static __always_inline void remember_fragment(struct __sk_buff *skb, struct packet *packet) {
    if (packet->fragment && packet->whole)
        remember_ports(skb, packet);
}

// Of a fragment that has no ports: those that the first one had.
static __always_inline int follow_fragment(struct __sk_buff *skb, struct packet *packet) {
    struct tuple *tuple = &packet->tuple;
    struct fragment_key key = fragment_key(skb, packet);
    struct ports *ports = bpf_map_lookup_elem(&fragments, &key);
    if (!ports)
        return -1;
    tuple->source_port = ports->source;
    tuple->destination_port = ports->destination;
    return 0;
}

// Reads the addresses of a packet of this protocol, whose header is there; fails for what is not IP.
SEPARATE int read_addresses(struct __sk_buff *skb, struct packet *packet, __be32 protocol, __u32 at) {
    if (!packet)
        return -1;
    if (protocol == bpf_htons(ETH_P_IP))
        return read_ipv4(skb, packet, at);
    if (protocol == bpf_htons(ETH_P_IPV6))
        return read_ipv6(skb, packet, at);
    return -1;
}

// Reads the ports; fails where the protocol has none.
SEPARATE int read_ports(struct __sk_buff *skb, struct packet *packet) {
    if (!packet)
        return -1;
    struct tuple *tuple = &packet->tuple;
    if (tuple->protocol != IPPROTO_TCP && tuple->protocol != IPPROTO_UDP &&
        tuple->protocol != IPPROTO_SCTP)
        return -1;
    if (packet->whole) {
        struct ports ports;
        if (load(skb, packet->transport, &ports, sizeof ports))
            return -1;
        tuple->source_port = ports.source;
        tuple->destination_port = ports.destination;
        if (tuple->protocol == IPPROTO_TCP &&
            load(skb, packet->transport + 13, &packet->tcp_flags, 1))
            return -1;
    }
    return packet->whole ? 0 : follow_fragment(skb, packet);
}
