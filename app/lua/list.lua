-- A page of tasks, newest first; ties by id, byte by byte, as the sorted sets have them.
-- KEYS: the sets of each union, one union after another; those of one union are disjoint.
-- ARGV: offset, limit, at most so many steps, as JSON how many sets each union has and the ways to the list
-- [union to walk, [unions that each task must be in besides]], organisation, created from, created until, the score and
-- id after which the page begins ('' '': at the start), then the fields to answer with.
-- The way with the fewest tasks is walked. Where it has no further unions, the total is exact. Else it counts what the
-- walk saw: from the start everything up to so many steps, from a cursor no more than the page; `capped` says that.
-- Answers {total, capped, score and id up to which the page is complete ('' '': to the end), {values…, id, score}…}.
local offset, limit, steps = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local sizes, ways = unpack(cjson.decode(ARGV[6]))
local org, since, till, after_score, after_id = ARGV[7], ARGV[8], ARGV[9], ARGV[10], ARGV[11]
local resumed = after_score ~= ''
local wanted = {}
for i = 12, #ARGV do wanted[#wanted + 1] = ARGV[i] end
-- So many members are read, or looked up, by one call.
local SHARE = 200

-- Lua's own comparison is that of the server's locale.
local function later_id(a, b)
  for i = 1, math.min(#a, #b) do
    local x, y = string.byte(a, i), string.byte(b, i)
    if x ~= y then return x > y end
  end
  return #a > #b
end

local function newer(a, b)
  if a.score ~= b.score then return a.score > b.score end
  return later_id(a.id, b.id)
end

-- How many members of the set stand before the page's cursor, or at it.
local function passed(set)
  local low = redis.call('ZCOUNT', set, '(' .. after_score, '+inf')
  local high = low + redis.call('ZCOUNT', set, after_score, after_score)
  while low < high do
    local middle = math.floor((low + high) / 2)
    local id = redis.call('ZREVRANGE', set, middle, middle)[1]
    if later_id(after_id, id) then high = middle else low = middle + 1 end
  end
  return low
end

local unions, first = {}, 1
for i, size in ipairs(sizes) do
  unions[i] = { unpack(KEYS, first, first + size - 1) }
  first = first + size
end

local walked, checks, members = nil, nil, nil
for _, way in ipairs(ways) do
  local count = 0
  for _, set in ipairs(unions[way[1]]) do count = count + redis.call('ZCOUNT', set, since, till) end
  if not walked or count < members or count == members and #way[2] < #checks then
    walked, checks, members = unions[way[1]], way[2], count
  end
end
local filtered = #checks > 0

-- Each set's newest member that was not looked at yet, the newest of them first.
local heads = {}
local function advance(head)
  head.at = head.at + 2
  if not head.share[head.at] then
    if head.rank >= head.stop then return false end
    local next_rank = math.min(head.rank + head.size, head.stop)
    head.share = redis.call('ZREVRANGE', head.set, head.rank, next_rank - 1, 'WITHSCORES')
    head.rank, head.at = next_rank, 1
  end
  head.id, head.score = head.share[head.at], tonumber(head.share[head.at + 1])
  return true
end
local skipped, size = 0, SHARE
if not filtered then
  size = math.min(SHARE, offset + limit)
  -- A single set is entered where the page begins, however deep.
  if #walked == 1 then skipped = offset end
end
for _, set in ipairs(walked) do
  local rank = till == '+inf' and 0 or redis.call('ZCOUNT', set, '(' .. till, '+inf')
  local stop = rank + redis.call('ZCOUNT', set, since, till)
  if resumed then rank = math.max(rank, passed(set)) end
  local head = { set = set, rank = rank + skipped, stop = stop, share = {}, at = 1, size = size }
  if advance(head) then heads[#heads + 1] = head end
end
table.sort(heads, newer)

-- The next so many of the walk.
local function read(count)
  local found = {}
  while #found < count and heads[1] do
    local head = heads[1]
    found[#found + 1] = { id = head.id, score = head.score }
    if advance(head) then
      local i = 1
      while heads[i + 1] and newer(heads[i + 1], head) do
        heads[i] = heads[i + 1]
        i = i + 1
      end
      heads[i] = head
    else
      table.remove(heads, 1)
    end
  end
  return found
end

-- Of these the ones that are in each of the further unions.
local function fitting(found)
  for _, check in ipairs(checks) do
    if #found == 0 then break end
    local ids, hits, left = {}, {}, {}
    for i, one in ipairs(found) do ids[i] = one.id end
    for _, set in ipairs(unions[check]) do
      for i, score in ipairs(redis.call('ZMSCORE', set, unpack(ids))) do hits[i] = hits[i] or score end
    end
    for i, one in ipairs(found) do
      if hits[i] then left[#left + 1] = one end
    end
    found = left
  end
  return found
end

local page, fit, last, taken = {}, skipped, nil, 0
local whole = filtered and not resumed
while heads[1] and taken < steps and (whole or #page < limit) do
  local found = read(math.min(size, steps - taken))
  taken = taken + #found
  last = found[#found]
  for _, one in ipairs(fitting(found)) do
    fit = fit + 1
    if fit > offset and #page < limit then page[#page + 1] = one end
  end
end

local total, capped = members, heads[1] and #page < limit
if filtered then total, capped = fit, heads[1] or resumed end
local answer = { digits(total), capped and '1' or '0', '', '' }
if heads[1] or fit > offset + #page then
  if #page == limit then last = page[limit] end
  answer[3], answer[4] = digits(last.score), last.id
end
for _, one in ipairs(page) do
  local values = {}
  if #wanted > 0 then values = redis.call('HMGET', key('task', org .. ':' .. one.id), unpack(wanted)) end
  values[#wanted + 1], values[#wanted + 2] = one.id, digits(one.score)
  answer[#answer + 1] = values
end
return answer
